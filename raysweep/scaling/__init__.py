"""The laws: how optima and losses scale. Arrays in, frozen results with a status out."""
