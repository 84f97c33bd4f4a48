"""Pages: documents as HTML that needs no network, no JavaScript to be read and no other file."""
