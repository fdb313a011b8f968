"""The version of edgert, for whoever must not import the rest."""

VERSION = "0.1.0"
