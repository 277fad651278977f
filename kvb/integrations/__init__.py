"""kvb inside of other libraries, each in a module of its name that is imported by whoever has the library."""
