"""A recipe as a file, in and out, and what it says of each layer."""
