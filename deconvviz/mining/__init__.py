"""One pass over a data set: the strongest units of every feature map, resumable and mergeable."""
