"""The recorder as a callback of the trainers of Hugging Face and Lightning."""
