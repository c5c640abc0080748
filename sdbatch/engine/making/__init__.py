"""From a plan to committed pictures: the pool in the driver, generators in its actors."""
