"""A head whose vocabulary or rows are spread over processes."""
