"""The world outside, one file each: hub, linear. Plain async clients; they decide nothing."""
