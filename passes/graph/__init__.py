"""What every pass stands on: evaluating pieces of a graph, editing a program, knowing what writes where."""
