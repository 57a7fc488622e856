// Stands in for the header of the same name: a plain host compiler needs nothing of it.
