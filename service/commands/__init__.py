"""The commands of ``palisade-serve``, one file each."""
