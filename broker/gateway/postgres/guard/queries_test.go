//go:build !slow

package guard

// queries is how many random queries the lineage is tried on.
const queries = 300
