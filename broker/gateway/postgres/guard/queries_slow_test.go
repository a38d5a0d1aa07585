//go:build slow

package guard

const queries = 10_000
