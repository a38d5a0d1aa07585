//go:build !slow

package main

// killsInTests is how many times the crash test kills a process.
const killsInTests = 8
