"""Charts: SVG and PNG by matplotlib, from plain data."""
