"""Questions about the images of a source, with their answers."""
