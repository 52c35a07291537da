"""Arrays in files: paths, layouts and metadata, memory maps and downloads, marks of what is durable."""
