"""What ``palisade-serve predict`` is made of: image files, and those who classify them, here or at a running service."""
