"""Tools that every room needs: validation, atomic files, text, random streams, processes, sharded tensors."""
