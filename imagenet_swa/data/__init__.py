"""Everything between the files on disk and a batch that the network can take."""
