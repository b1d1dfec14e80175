"""The parts of DSA as graph nodes: the absorbed attention and the lightning indexer."""
