"""What stands behind the four modules: nothing here is meant to be imported from outside."""
