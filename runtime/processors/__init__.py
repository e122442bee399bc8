"""One module a family of models: pictures -> inputs of the vision graph, and positions of the tokens."""
