"""Graph in, graph out: find MLA by data flow, rewrite it into DSA, expose what calibration needs."""
