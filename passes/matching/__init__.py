"""The parts of an MLA attention: cores, masks, rotary embeddings, and the words for what was found."""
