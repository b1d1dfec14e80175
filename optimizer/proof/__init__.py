"""What is proved: dense and sparse side by side, baselines, and the word of transformers."""
