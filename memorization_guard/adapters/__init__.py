"""What puts a library's sampling in the core's terms."""
