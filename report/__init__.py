"What the record says: from rows to verdicts, tables and figures. Needs no torch."
