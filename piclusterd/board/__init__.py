"""The machine underneath: sensors from /sys and psutil, and the words systemd understands."""
