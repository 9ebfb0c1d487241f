"""What a model is worth, in numbers: likeness to real pictures, agreement with the prompt, and speed."""
