"""Measurements. Each module is a program (`make bench NAME=gossip`); `report` writes what they found."""
