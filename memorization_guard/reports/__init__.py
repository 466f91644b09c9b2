"""What people read: pages, charts and graphs."""
