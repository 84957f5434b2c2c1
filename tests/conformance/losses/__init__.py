"""What the tests of all losses need to know of each: one file a family."""
