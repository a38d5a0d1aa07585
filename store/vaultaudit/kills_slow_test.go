//go:build slow

package vaultaudit

// kills is how often the follower is killed.
const kills = 30
