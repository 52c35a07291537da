"""What people call: `attribute`, `Tracer`, the store reader, exact scores and token influence."""
