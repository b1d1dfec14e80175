"""Which layers can do without an indexer: they attend to what the last layer before them selected (GLM-5.2's `shared`)."""
