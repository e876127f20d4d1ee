"""The main job on one machine, told as it happens, and the doubles of the outside world that it and the tests use."""
