"""Reports of studies in HTML and Markdown; HTML needs the extra `report`."""
