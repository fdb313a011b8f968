"""Devices as one: every layer of a model is divided over the devices of a LAN, and their partial results are summed."""
