"""A long context in little memory: which cached tokens a step needs, and where their keys and values lie."""
