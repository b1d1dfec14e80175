"""DSA checkpoints: config.json in the words of DeepSeek-V3.2, writing, stripping."""
