"""The client: `picluster`. Talks to the daemon's unix socket, or to a URL with a key. Decides nothing."""
