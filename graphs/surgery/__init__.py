"""Reading and changing decoder graphs: layers and seams, regions, selections, splits, chains."""
