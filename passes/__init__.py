"""The stages that a captured graph goes through, one file each."""
