"""How visual tokens are ranked."""
