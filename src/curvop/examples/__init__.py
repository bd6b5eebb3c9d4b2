"""Reference computations that the documentation and the tests compare against."""
