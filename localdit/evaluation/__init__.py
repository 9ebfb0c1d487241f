"""What a model is worth, in numbers: agreement with the prompt, and speed."""
