"Says what the record shows: from rows to verdicts, tables and figures. Needs no torch."
