"""A long context in little memory: which cached tokens a step needs, and where keys and values lie meanwhile."""
