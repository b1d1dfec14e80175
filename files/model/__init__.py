"""What a folder in the layout of Hugging Face says beside its weights: which files are the model, what ends a text."""
