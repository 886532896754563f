"""What a node of a workflow does: operations of version 1, and the plain chain's three."""
