"""The interface for users: `attribute`, `Tracer`, the store reader, exact scores and token influence."""
